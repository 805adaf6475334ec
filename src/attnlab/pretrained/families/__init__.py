"""One family of models, one file; the folder listing is the registry.

MODEL_TYPES                   the `model_type` of the config.json files it reads
MECHANISMS                    those it has; (): any
to_model_config(hf)           that config -> ModelConfig; a UserError for what we cannot compute
from_model_config(config)     and back, as well as the family can say it; left out where we only read
table(model)                  rows of tensor names, with what happens on the way (see `tensor_names.py`)
PREFIX, EXTRA                 what a checkpoint of the bare model leaves out of its names; names to pass over
"""
