"""The head: requests and their jobs, the scheduler, the registry of instances, the journal."""
