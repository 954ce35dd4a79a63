"""How it is measured on a CPU: paired timing, the gate, counts, and the store of the rows."""
