"""All contact with SGLang: the scheduler process, its plugin, the CPU platform and attention."""
