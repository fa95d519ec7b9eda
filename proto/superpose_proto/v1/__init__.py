"""Version 1 of the contract, package `superpose.v1`."""
