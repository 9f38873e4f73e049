"""Why a study's layouts are as good as they are: numbers from its records. It draws nothing and writes nothing."""
