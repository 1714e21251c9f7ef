"""Pictures and helpers of one lesson each."""
