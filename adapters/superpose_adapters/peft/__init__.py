"""Reading PEFT folders: the one door from untrusted files to an adapter."""
