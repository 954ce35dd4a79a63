"""What is measured: workloads, models and their steps, and who normalises them."""
