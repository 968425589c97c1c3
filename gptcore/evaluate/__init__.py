"""Looking at trained models: what they are made of, and which tokens they look at."""
