"""Reading bases: a checkpoint folder in, transformers' model out, whole or refused."""
