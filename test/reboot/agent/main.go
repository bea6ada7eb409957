// Command agent runs inside the machine under test and lets the test outside
// of it run commands there and reach the pods:
//
//	POST /exec              runs the body with bash; the answer is its output, the
//	                        trailer Exit-Status its exit status
//	CONNECT ADDRESS:PORT    a TCP connection as the node makes it
//
// It is open to whoever can connect: to the test alone, over QEMU's forwarding.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: agent ADDRESS:PORT")
		os.Exit(2)
	}
	server := &http.Server{Addr: os.Args[1], ReadHeaderTimeout: 30 * time.Second, Handler: http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) {
			switch {
			case r.Method == http.MethodConnect:
				connect(w, r)
			case r.Method == http.MethodPost && r.URL.Path == "/exec":
				run(w, r)
			default:
				http.NotFound(w, r)
			}
		})}
	fmt.Fprintln(os.Stderr, "agent:", server.ListenAndServe())
	os.Exit(1)
}

// run ends the command when the caller goes away.
func run(w http.ResponseWriter, r *http.Request) {
	script, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Trailer", "Exit-Status")
	w.WriteHeader(http.StatusOK)
	out := flushing{w, http.NewResponseController(w)}
	c := exec.CommandContext(r.Context(), "/bin/bash")
	c.Stdin, c.Stdout, c.Stderr = strings.NewReader(string(script)), out, out
	c.WaitDelay = 5 * time.Second // for what it left in the background with its output
	status := 0
	if err := c.Run(); err != nil {
		status = 127
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			status = exit.ExitCode()
		} else {
			fmt.Fprintln(out, "agent:", err)
		}
	}
	w.Header().Set("Exit-Status", strconv.Itoa(status))
}

// flushing sends each write at once, so that the output up to a power cut is seen.
type flushing struct {
	w io.Writer
	c *http.ResponseController
}

func (f flushing) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err == nil {
		err = f.c.Flush()
	}
	return n, err
}

func connect(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 20*time.Second)
	defer cancel()
	var d net.Dialer
	pod, err := d.DialContext(ctx, "tcp", r.Host)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer pod.Close()
	w.WriteHeader(http.StatusOK)
	caller, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer caller.Close()
	done := make(chan struct{}, 2)
	splice := func(to io.Writer, from io.Reader) {
		io.Copy(to, from) //nolint:errcheck // either end may go at any time
		done <- struct{}{}
	}
	go splice(pod, buffered)
	go splice(caller, pod)
	<-done
}
