"""What both tuners share, laid out like a tuner."""
