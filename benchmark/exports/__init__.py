"""What a customization run learnt, in the formats of other tools, and images made with it."""
