"""What the verbs do: ``run`` of the module with the verb's name takes the parsed options and calls the rooms below."""
