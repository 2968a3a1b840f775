"""After training: changes that forget less (`adapters`, `checkpoints`), several in one (`combine`), and their drift (`drift`)."""
