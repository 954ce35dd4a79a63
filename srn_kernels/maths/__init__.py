"""The formulas of normalisation, on plain tensors: nothing here knows a module or a kernel."""
