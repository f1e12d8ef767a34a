"""The store in an SQL database: its tables, rows and statements, and what is done in one transaction."""
