// stasis is the command of the node's operator. See its --help.
package main

import (
	"context"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

var version = "unknown" // set by the linker

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	code := run(ctx, os.Args[1:], terminal{os.Stdin, os.Stdout, os.Stderr})
	stop()
	os.Exit(code)
}
