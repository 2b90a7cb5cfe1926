"""Language models as the rest of the project sees them: the one door to TransformerLens.

`load_model` turns a name, a folder or a module into a `LoadedModel`: `hf`, the plain Hugging Face model that is trained
and saved, and `bridge`, a view of the same parameters with a hook at every activation. `checkpoints` finds the files,
`twin` makes the view, `checks` refuses models whose view would give plausible but wrong numbers.
"""

from mechun.models.checks import check_hooks as check_hooks
from mechun.models.loading import load_model as load_model
from mechun.models.loading import load_tokenizer as load_tokenizer
from mechun.models.view import LoadedModel as LoadedModel
