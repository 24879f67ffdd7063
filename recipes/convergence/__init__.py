"""The recipe `convergence`: stationarity against outer steps, and the error floor against the follower's distance."""
