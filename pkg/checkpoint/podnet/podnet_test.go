package podnet_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/internal/testenv"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/podnet"
)

func TestParseURL(t *testing.T) {
	for raw, ok := range map[string]bool{
		"http://localhost/": true, "http://pod:8080/a?b=c": true, "https://localhost:8443": true, "http://localhost:65535/": true,
		"": false, "/": false, "localhost:8080": false, "ftp://localhost/": false, "http://example.com/": false, "http://127.0.0.1/": false,
		"http://169.254.169.254/": false, "http://localhost@example.com/": false, "http://u:p@localhost/": false, "http://localhost.example.com/": false,
		"http://localhost:0/": false, "http://localhost:65536/": false, "http://localhost:x/": false, "http://local\nhost/": false,
		"http://localhost/" + strings.Repeat("x", 2048): false,
	} {
		u, err := podnet.ParseURL(raw)
		if (err == nil) != ok || (u == nil) != (err != nil) || err != nil && !errors.Is(err, checkpoint.ErrInvalid) {
			t.Errorf("%.100q: %v, %v", raw, u, err)
		}
	}
}

// pod makes a network namespace in which a server listens, and returns the ID of
// a thread that is in it.
func pod(t *testing.T, address string, h http.Handler) (tid int, port string) {
	t.Helper()
	testenv.Need(t, testenv.Root)
	type answer struct {
		tid int
		l   net.Listener
		err error
	}
	ch, end := make(chan answer), make(chan struct{})
	go func() { // ends with the test, and its thread with it
		runtime.LockOSThread()
		a := answer{tid: unix.Gettid()}
		if a.err = unix.Unshare(unix.CLONE_NEWNET); a.err == nil {
			a.err = loopbackUp()
		}
		if a.err == nil {
			a.l, a.err = net.Listen("tcp", address+":0")
		}
		ch <- a
		<-end
	}()
	t.Cleanup(func() { close(end) })
	a := <-ch
	if a.err != nil {
		t.Fatal(a.err)
	}
	s := &http.Server{Handler: h}
	go s.Serve(a.l) // ends with Close
	t.Cleanup(func() { s.Close() })
	_, port, _ = net.SplitHostPort(a.l.Addr().String())
	return a.tid, port
}

// loopbackUp also gives the namespace the address 10.9.8.7.
func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r); err != nil {
		return err
	}
	if r, err = unix.NewIfreq("lo:0"); err != nil {
		return err
	}
	if err := r.SetInet4Addr([]byte{10, 9, 8, 7}); err != nil {
		return err
	}
	return unix.IoctlIfreq(s, unix.SIOCSIFADDR, r)
}

// TestPodAddress: a server that listens on the pod's own address only is found.
func TestPodAddress(t *testing.T) {
	tid, port := pod(t, "10.9.8.7", http.NotFoundHandler())
	n, err := podnet.Open(tid)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	u, err := podnet.ParseURL("http://pod:" + port)
	if err != nil {
		t.Fatal(err)
	}
	if status, err := n.Get(t.Context(), u); err != nil || status != 404 {
		t.Errorf("%d, %v", status, err)
	}
}

// TestGet: the pod is asked, and nobody else, whatever it answers.
func TestGet(t *testing.T) {
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1/")
	t.Setenv("http_proxy", "http://127.0.0.1:1/")
	mux := http.NewServeMux()
	mux.HandleFunc("/ok", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, strings.Repeat("x", 1<<20)) })
	mux.HandleFunc("/away", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "http://169.254.169.254/", 302) })
	mux.HandleFunc("/bad", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(503) })
	mux.HandleFunc("/slow", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	mux.HandleFunc("/headers", func(w http.ResponseWriter, r *http.Request) { w.Header().Set("X", strings.Repeat("x", 1<<20)) })
	tid, port := pod(t, "127.0.0.1", mux)
	before, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	n, err := podnet.Open(tid)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	for path, want := range map[string]int{"/ok": 200, "/away": 302, "/bad": 503, "/none": 404, "/slow": 0, "/headers": 0} {
		for _, host := range []string{"localhost", "pod"} {
			u, err := podnet.ParseURL("http://" + host + ":" + port + path)
			if err != nil {
				t.Fatal(err)
			}
			limit := 10 * time.Second
			if path == "/slow" {
				limit = 100 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			if status, err := n.Get(ctx, u); status != want || (err == nil) != (want != 0) {
				t.Errorf("%s: %d, %v, want %d", u, status, err, want)
			}
			cancel()
		}
	}
	// Who listens on the node's loopback is not reached from the pod's.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	u, err := podnet.ParseURL("http://localhost:" + strings.TrimPrefix(l.Addr().String(), "127.0.0.1:") + "/ok")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Get(t.Context(), u); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("the node's own listener: %v", err)
	}
	for range 50 { // whatever thread this is
		if after, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || after != before {
			t.Fatalf("a thread is in %s, not %s: %v", after, before, err)
		}
		runtime.Gosched()
	}
	if _, err := podnet.Open(1 << 30); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no such process: %v", err)
	}
}
