"""The HTTP door: OpenAI's API for texts, and ours for mixes, as `docs/http.md` has them.

One table of fields (`Form`) reads a body, refuses what it does not know and describes it; one
table of endpoints (`Endpoint`) routes calls and describes them.
"""
