"""Ask a checkpoint about an image in the browser: answer, located task, experts."""
