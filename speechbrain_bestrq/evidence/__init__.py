"""What the hidden states of an encoder are good for, measured in minutes by probes that are linear."""
