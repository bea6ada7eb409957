// Package podnet asks HTTP servers in the network namespace of a pod, from the
// node.
//
// Invariants:
//
//   - Every connection is made inside the pod's network namespace and to an
//     address of that namespace itself: neither a URL, nor an answer, nor the
//     environment (proxies) leads to anybody else.
//   - The thread that enters the namespace comes back from it, or ends.
//   - An answer is read with bounds, and thrown away.
package podnet

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

const (
	maxURLBytes    = 2 << 10
	maxHeaderBytes = 64 << 10
	// maxBodyBytes of an answer are read, so that the server has written them.
	maxBodyBytes = 64 << 20
)

// ParseURL checks a URL that is to be asked in a pod: http or https, and as host
// "localhost" or "pod", which both mean any address of the pod. Errors wrap
// [checkpoint.ErrInvalid].
func ParseURL(raw string) (*url.URL, error) {
	if len(raw) > maxURLBytes {
		return nil, fmt.Errorf("url of %d bytes, at most %d are allowed: %w", len(raw), maxURLBytes, checkpoint.ErrInvalid)
	}
	u, err := url.Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, checkpoint.ErrInvalid)
	}
	port, err := strconv.ParseUint(u.Port(), 10, 16)
	switch {
	case u.Scheme != "http" && u.Scheme != "https":
		err = errors.New("want http:// or https://")
	case u.User != nil:
		err = errors.New("a user is not supported")
	case u.Hostname() != "localhost" && u.Hostname() != "pod":
		err = errors.New("the host must be localhost or pod, which both mean the pod's own address")
	case u.Port() != "" && (err != nil || port == 0):
		err = errors.New("no such port")
	default:
		return u, nil
	}
	return nil, fmt.Errorf("url %q: %w: %w", raw, err, checkpoint.ErrInvalid)
}

// Network is the network namespace of a pod, for as long as it is open.
type Network struct {
	ns     *os.File
	client *http.Client
}

// Open opens the network namespace that a process is in. The caller makes sure,
// afterwards, that the process was still the one that is meant.
func Open(pid int) (*Network, error) {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/ns/net")
	if err != nil {
		return nil, fmt.Errorf("network of the pod: %w", err)
	}
	n := &Network{ns: f}
	n.client = &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialContext:            func(ctx context.Context, _, address string) (net.Conn, error) { return n.dial(ctx, address) },
			MaxResponseHeaderBytes: maxHeaderBytes,
			// Nobody certifies "localhost"; the connection does not leave the pod.
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		},
	}
	return n, nil
}

// Close ends the connections. Calls must have returned.
func (n *Network) Close() error {
	n.client.CloseIdleConnections()
	return n.ns.Close()
}

// Get asks for a URL of [ParseURL] and returns the status of the answer, which
// it has read by then. It ends with ctx.
func (n *Network) Get(ctx context.Context, u *url.URL) (status int, err error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return 0, err
	}
	r.Header.Set("User-Agent", "stasis")
	resp, err := n.client.Do(r)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if _, err := io.CopyN(io.Discard, resp.Body, maxBodyBytes); err != nil && !errors.Is(err, io.EOF) {
		return resp.StatusCode, fmt.Errorf("get %s: %w", u, err)
	}
	return resp.StatusCode, nil
}

// dial connects to the port of address on the first of the pod's addresses that
// takes the connection: loopback, then those of its interfaces.
func (n *Network) dial(ctx context.Context, address string) (net.Conn, error) {
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	var conn net.Conn
	err = n.inside(func() error {
		hosts, err := addresses()
		if err != nil {
			return err
		}
		var errs []error
		for _, host := range hosts {
			// For one literal address this makes the socket on this thread.
			c, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(host, port))
			if err == nil {
				conn = c
				return nil
			}
			errs = append(errs, err)
			if ctx.Err() != nil {
				break
			}
		}
		return errors.Join(errs...)
	})
	return conn, err
}

// addresses lists those of the namespace that the thread is in.
func addresses() ([]string, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	hosts, six := []string{"127.0.0.1"}, []string(nil)
	for _, a := range all {
		ip, _, err := net.ParseCIDR(a.String())
		switch {
		case err != nil:
		case ip.Equal(net.IPv6loopback):
			six = append([]string{ip.String()}, six...)
		case !ip.IsGlobalUnicast():
		case ip.To4() != nil:
			hosts = append(hosts, ip.String())
		default:
			six = append(six, ip.String())
		}
	}
	return append(hosts, six...), nil
}

// inside runs f on a thread that is in the namespace. The thread must not end
// where it comes back: see the shim's use of such threads.
func (n *Network) inside(f func() error) error {
	done := make(chan error, 1)
	go func() { // ends with f
		runtime.LockOSThread()
		back, err := n.there(f)
		if back {
			runtime.UnlockOSThread()
		} // else the thread is of no more use, and ends with this function
		done <- err
	}()
	return <-done
}

// there runs on a locked thread, and reports whether that is in its own
// namespace afterwards.
func (n *Network) there(f func() error) (back bool, err error) {
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return true, err
	}
	defer own.Close()
	if err := unix.Setns(int(n.ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return true, fmt.Errorf("enter the network of the pod: %w", err)
	}
	err = f()
	if berr := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); berr != nil {
		return false, errors.Join(err, fmt.Errorf("leave the network of the pod: %w", berr))
	}
	return true, err
}
