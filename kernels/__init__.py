"""Pure functions on tensors, one folder an operator; knows no layout, no module, no storage."""
