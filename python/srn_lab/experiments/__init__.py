"""The paper's experiments: declared, cut into units of work, cached by configuration, judged."""
