"""From a checkpoint's files to the layers of one stage, and what models need to be cut."""
