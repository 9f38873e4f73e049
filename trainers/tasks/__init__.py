"""One file a proxy task: what it generates, and what score a correct model reaches."""
