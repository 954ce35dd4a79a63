"""What people do with normalised models beside training them: convert, report, project."""
