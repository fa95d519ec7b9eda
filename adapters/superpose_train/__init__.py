"""The offline trainer; the server never imports it."""
