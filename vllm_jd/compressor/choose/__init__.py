"""Which settings: what they would cost and lose, and those that meet a target; which weights of a
blend.
"""
