"""What people do with models beside training them: examine, convert, report, project."""
