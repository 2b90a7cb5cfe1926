"""Small models of an invented world: who knows what is known by construction, so that claims can be tested on them."""
