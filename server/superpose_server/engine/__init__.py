"""The thread that runs rows: who runs, what runs in a step, which token is next."""
