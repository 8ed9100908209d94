"""Tasks that the suite runs in processes of their own, one module each; see ``child_process``."""
