"""How clients get in. Each door knows one wire; what a request is, the inference layer knows.

A door checks access and limits and turns errors into its wire in one place, before anything else;
what is left of a call is: convert, call `Inference` or an operator's action, convert.
"""
