"""What operators change and watch: the names of adapters, the default mix, the weights' state."""
