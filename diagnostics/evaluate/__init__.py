"""Quality: how well a model does its tasks under a policy, beside full depth."""
