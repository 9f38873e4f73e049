"""Linear recurrences by the trapezoidal rule: each token is written twice, when it comes and one token later."""
