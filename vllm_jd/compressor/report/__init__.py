"""What a store is and loses, in numbers and figures."""
