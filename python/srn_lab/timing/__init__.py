"""What converting a model changes in its step time: paired timing, for the demo."""
