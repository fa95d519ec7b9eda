"""The resident weights, how a fold writes them, and what a row adds when its mix is another."""
