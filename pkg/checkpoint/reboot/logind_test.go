package reboot

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
)

// bus is a logind on a real message bus of its own.
type bus struct {
	t    *testing.T
	conn *dbus.Conn

	mu    sync.Mutex
	asked []string
	locks []*os.File // what logind holds of each inhibitor
}

func (b *bus) Inhibit(what, who, why, mode string) (dbus.UnixFD, *dbus.Error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	r, w, err := os.Pipe()
	if err != nil {
		return 0, dbus.MakeFailedError(err)
	}
	b.asked = append(b.asked, what+" "+who+" "+mode)
	b.locks = append(b.locks, r)
	fd, err := unix.Dup(int(w.Fd())) // sent after this returns, and then nobody's
	w.Close()
	if err != nil {
		return 0, dbus.MakeFailedError(err)
	}
	go func() { // what stays here must not look like the inhibitor
		time.Sleep(200 * time.Millisecond)
		unix.Close(fd)
	}()
	return dbus.UnixFD(fd), nil
}

func (b *bus) Get(iface, name string) (dbus.Variant, *dbus.Error) {
	if iface != loginManager || name != "InhibitDelayMaxUSec" {
		return dbus.Variant{}, dbus.MakeFailedError(errors.New("no such property"))
	}
	return dbus.MakeVariant(uint64(20_000_000)), nil
}

func (b *bus) signal(down bool) {
	b.t.Helper()
	if err := b.conn.Emit(loginPath, loginManager+".PrepareForShutdown", down); err != nil {
		b.t.Fatal(err)
	}
}

// released waits until the n-th inhibitor is closed.
func (b *bus) released(n int) bool {
	b.t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		b.mu.Lock()
		var r *os.File
		if n < len(b.locks) {
			r = b.locks[n]
		}
		b.mu.Unlock()
		if r == nil {
			continue
		}
		if err := r.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			b.t.Fatal(err)
		}
		_, err := r.Read(make([]byte, 1))
		return errors.Is(err, io.EOF)
	}
	return false
}

func newBus(t *testing.T) *bus {
	t.Helper()
	if _, err := exec.LookPath("dbus-daemon"); err != nil {
		t.Skipf("needs dbus-daemon (Debian: dbus-daemon): %v", err)
	}
	dir, err := os.MkdirTemp("", "bus")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	config := filepath.Join(dir, "bus.conf")
	if err := os.WriteFile(config, []byte(`<busconfig><type>session</type><listen>unix:path=`+dir+`/bus</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>`), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("dbus-daemon", "--config-file="+config, "--nofork", "--print-address=1")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }) // killed, which Wait says
	address, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", strings.TrimSpace(address))
	conn, err := dbus.ConnectSystemBus()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	b := &bus{t: t, conn: conn}
	err = errors.Join(conn.Export(b, loginPath, loginManager), conn.Export(b, loginPath, "org.freedesktop.DBus.Properties"))
	if err == nil {
		_, err = conn.RequestName(loginName, dbus.NameFlagDoNotQueue)
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestGuard: a shutdown waits until the containers are dumped and the kubelet
// is stopped; one that does not take place is undone.
func TestGuard(t *testing.T) {
	b := newBus(t)
	n := newTestNode(t)
	n.kubelet.running = true
	a := n.add("a", nil)
	n.add("b", func(s *testShim) { s.prepareErr = errors.New("io_uring") })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	l, err := OpenLogind(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if d, err := l.MaxDelay(ctx); err != nil || d != 20*time.Second {
		t.Errorf("delay %v, %v", d, err)
	}
	done := make(chan error, 1)
	go func() { done <- n.Guard(ctx, l, Options{}) }()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		b.mu.Lock()
		asked := strings.Join(b.asked, ", ")
		b.mu.Unlock()
		if asked == "shutdown stasis delay" {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("asked for %q", asked)
		}
	}
	b.signal(true)
	if !b.released(0) {
		t.Fatal("the shutdown is still held up")
	}
	m, err := Load(fsys.OS{}, n.Root)
	if err != nil || summary(m.Containers) != "a:dumped b:failed" || m.StoppedKubelet != "kubelet.service" {
		t.Fatalf("%+v, %v", m, err)
	}
	b.signal(true) // once is enough
	b.signal(false)
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		b.mu.Lock()
		again := len(b.asked) == 2
		b.mu.Unlock()
		if again {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the next shutdown would not wait")
		}
	}
	a.mu.Lock()
	if got := strings.Join(a.log, ","); got != "k8s.io prepare,k8s.io abort" {
		t.Errorf("shim %s", got)
	}
	a.mu.Unlock()
	// logind goes: whoever called may try again.
	l.Close()
	select {
	case err := <-done:
		if err == nil {
			t.Error("no reason")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it does not end with the connection")
	}
	if got := strings.Join(n.kubelet.log, ","); got != "stop,start" {
		t.Errorf("kubelet %s", got)
	}
	if !b.released(1) {
		t.Error("the inhibitor is left behind")
	}
}

func TestNoLogind(t *testing.T) {
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nowhere/bus")
	if l, err := OpenLogind(t.Context()); err == nil {
		t.Errorf("%v", l)
	}
}
