"""One file a channel mixer, under the same promises as the sequence mixers."""
