"""How good is a compressed context? Tasks, methods, metrics, resumable runs, and reports."""
