package main

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/stasis-containers/stasis/internal/testenv"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
)

// Run notes the command, and fails it as long as the test says.
func (s *rebootShim) Run(ctx context.Context, _ string, args []string) (control.RunResult, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ran = append(s.ran, args)
	switch {
	case s.runErr != nil:
		return control.RunResult{}, s.runErr
	case args[0] == "hang":
		<-ctx.Done()
		return control.RunResult{}, ctx.Err()
	case s.notReady > 0:
		s.notReady--
		return control.RunResult{ExitStatus: 7, Output: "not\x1b[31m yet"}, nil
	}
	return control.RunResult{}, nil
}

func warmable(t *testing.T) (*rebootNode, *rebootShim, func(more ...string) []string) {
	n := newRebootNode(t)
	a := n.serve("a")
	a.status.Identity = checkpoint.Identity{Namespace: "default", Key: "a", Container: "c"}
	return n, a, func(more ...string) []string {
		return n.create(append([]string{"shop", "--pod", "default/pod-a\x1b[31m"}, more...)...)
	}
}

func (n *rebootNode) templates() int {
	n.t.Helper()
	all, err := n.Templates(n.t.Context())
	if err != nil {
		n.t.Fatal(err)
	}
	return len(all)
}

func TestWarmupExec(t *testing.T) {
	n, a, create := warmable(t)
	n.must(create("--warmup-exec", "warm up", "--warmup-exec", `["/bin/x", "a b"]`, "--warmup-count", "2")...)
	want := [][]string{{"/bin/sh", "-c", "warm up"}, {"/bin/x", "a b"}, {"/bin/sh", "-c", "warm up"}, {"/bin/x", "a b"}}
	if !slices.EqualFunc(a.ran, want, slices.Equal) {
		t.Errorf("ran %q", a.ran)
	}
	if n.templates() != 1 {
		t.Error("no template")
	}

	// What fails makes no template, unless it works within --wait for the first time.
	a.notReady = 3
	n.fails(exitFailure, "exit code 7: not?[31m yet; no template", create("--warmup-exec", "x")...)
	a.notReady = 3
	n.must(create("--warmup-exec", "x", "--wait", "20s")...)
	if n.templates() != 2 {
		t.Error("no template after the wait")
	}
	a.notReady = 1 << 30
	n.fails(exitFailure, "exit code 7", create("--warmup-exec", "x", "--wait", "300ms")...)
	a.notReady = 0
	n.fails(exitFailure, "not done after 50ms", create("--warmup-exec", `["hang"]`, "--warmup-timeout", "50ms")...)
	begin := time.Now()
	a.runErr = errdefs.ErrFailedPrecondition
	n.fails(exitFailure, "warm-up: x: ", create("--warmup-exec", "x", "--wait", "20s")...)
	a.runErr = errdefs.ErrNotImplemented
	n.fails(exitFailure, "older release", create("--warmup-exec", "x", "--wait", "20s")...)
	if d := time.Since(begin); d > 15*time.Second {
		t.Errorf("waited %s for what cannot come", d)
	}
	a.runErr = nil
	if n.templates() != 2 {
		t.Error("a template of a container that was not warm")
	}
	for _, args := range [][]string{
		{"--warmup-exec", ""}, {"--warmup-exec", "[]"}, {"--warmup-exec", `[""]`}, {"--warmup-exec", "[1]"}, {"--warmup-exec", "[x"},
		{"--warmup-count", "0"}, {"--warmup-count", "1000001"}, {"--warmup-timeout", "0s"},
		{"--warmup-url", "http://example.com/"}, {"--warmup-url", "localhost:8080"},
	} {
		n.fails(exitUsage, "--warmup-", create(args...)...)
	}
}

func TestWarmupURL(t *testing.T) {
	testenv.Need(t, testenv.Root)
	n, a, create := warmable(t)
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/warm" {
			w.WriteHeader(404)
		} else if asked.Add(1) <= 3 {
			w.WriteHeader(503)
		}
	}))
	defer server.Close()
	_, port, err := net.SplitHostPort(strings.TrimPrefix(server.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	url := "http://localhost:" + port
	n.fails(exitFailure, "network", create("--warmup-url", url)...) // its process is gone
	a.mu.Lock()
	a.status.PID = os.Getpid() // the network of this test is the pod's
	a.mu.Unlock()
	n.fails(exitFailure, "answer 503; no template", create("--warmup-url", url+"/warm")...)
	n.must(create("--warmup-url", url+"/warm", "--warmup-count", "5", "--wait", "20s")...)
	if got := asked.Load(); got != 3+5 {
		t.Errorf("asked %d times", got)
	}
	n.fails(exitFailure, "answer 404", create("--warmup-url", url, "--wait", "300ms")...)
	server.Close()
	n.fails(exitFailure, "connection refused", create("--warmup-url", url+"/warm")...)
	if n.templates() != 1 {
		t.Error("want one template")
	}
}
