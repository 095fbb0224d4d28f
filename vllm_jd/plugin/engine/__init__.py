"""Inside the engine process: which adapter lies where, and what the workers are told to do."""
