"""Softmax attention of blocks of queries over lists of blocks of keys, with the log-sum-exp by which parts are merged."""
