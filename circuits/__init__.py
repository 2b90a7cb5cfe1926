"""The wiring of one model: its graph, the attribution of every edge, and circuits."""
