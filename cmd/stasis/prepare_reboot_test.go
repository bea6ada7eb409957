package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/ttrpc"

	"github.com/stasis-containers/stasis/nri"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/reboot"
	"github.com/stasis-containers/stasis/shim"
)

// rebootNode is a store, containerd's state directory, and shims.
type rebootNode struct {
	*testStore
	state string
}

func newRebootNode(t *testing.T) *rebootNode {
	t.Helper()
	state, err := os.MkdirTemp("", "rb") // a socket's name must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(state) })
	return &rebootNode{newStore(t), state}
}

func (n *rebootNode) args(more ...string) []string {
	return append([]string{"prepare-reboot", "--containerd-state", n.state}, more...)
}

// rebootShim serves one container of the key.
type rebootShim struct {
	control.Server // what it does not mention is not called
	n              *rebootNode
	key            string

	mu     sync.Mutex
	err    error // of Prepare
	hang   bool  // Prepare answers only when its caller has gone
	memory int64
	status control.Status

	ran      [][]string // by Run
	runErr   error
	notReady int // how many more runs fail
}

func (s *rebootShim) Status(context.Context, string) (control.Status, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.status
	st.MemoryBytes = s.memory
	return st, nil
}

func (s *rebootShim) Prepare(ctx context.Context, _ string) (control.Result, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hang {
		s.mu.Unlock()
		<-ctx.Done()
		s.mu.Lock()
		return control.Result{}, ctx.Err()
	}
	if s.err != nil {
		return control.Result{}, s.err
	}
	if s.status.CheckpointID == "" {
		s.status.State, s.status.CheckpointID = control.Prepared, s.n.add(s.key, time.Now(), nil)
	}
	return control.Result{CheckpointID: s.status.CheckpointID, SizeBytes: 3 << 20, Duration: 1500 * time.Millisecond}, nil
}

func (s *rebootShim) Abort(ctx context.Context, _ string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.status.CheckpointID != "" {
		if err := s.n.Remove(ctx, s.status.CheckpointID); err != nil {
			return err
		}
	}
	s.status.State, s.status.CheckpointID = control.Running, ""
	return nil
}

func (n *rebootNode) serve(key string) *rebootShim {
	n.t.Helper()
	s := &rebootShim{n: n, key: key, memory: 10 << 20, status: control.Status{State: control.Running, PID: 1<<22 + 1}} // beyond what a process may have
	bundle := filepath.Join(n.state, "io.containerd.runtime.v2.task/k8s.io", "4f5a0e9d2c1b"+key)
	spec, err := json.Marshal(map[string]any{"annotations": map[string]string{
		checkpoint.InternalPolicy: "reboot", checkpoint.InternalKey: key, "io.kubernetes.cri.sandbox-namespace": "default",
		"io.kubernetes.cri.sandbox-name": "pod-" + key + "\x1b[31m", "io.kubernetes.cri.container-name": "c",
	}})
	if err != nil {
		n.t.Fatal(err)
	}
	socket := filepath.Join(n.state, key)
	writeFile(n.t, filepath.Join(bundle, "config.json"), string(spec), 0o600)
	writeFile(n.t, filepath.Join(bundle, "bootstrap.json"), `{"version":3,"address":"unix://`+socket+`","protocol":"ttrpc"}`, 0o600)
	l, err := net.Listen("unix", socket)
	if err != nil {
		n.t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		n.t.Fatal(err)
	}
	control.Register(server, s)
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(context.Background(), l) }() // its error is that it was closed
	n.t.Cleanup(func() { server.Close(); <-done })
	return s
}

func TestPrepareReboot(t *testing.T) {
	n := newRebootNode(t)
	n.serve("a")
	b := n.serve("b")
	b.err = errors.New("io_uring\x1b[2J is open")
	out, stderr, code := n.run(n.args("--ignore-kubelet")...)
	if code != exitFailure || strings.ContainsRune(out+stderr, '\x1b') {
		t.Errorf("exit code %d\n%s%s", code, out, stderr)
	}
	for _, want := range []string{"CONTAINER", "default/a/c", "pod-a?[31m", "dumped", "3.0 MiB", "1.5s", "failed", "io_uring", "1 of 2 containers dumped, 3.0 MiB"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	for _, want := range []string{"[1/2]", "[2/2]", "default/b/c  failed: ", "--abort"} {
		if !strings.Contains(stderr, want) {
			t.Errorf("no %q in\n%s", want, stderr)
		}
	}
	n.must(n.args("--ignore-kubelet", "--best-effort")...)

	b.mu.Lock()
	b.err = nil
	b.mu.Unlock()
	var m struct {
		reboot.Manifest
		Complete bool `json:"complete"`
	}
	if err := json.Unmarshal([]byte(n.must(n.args("--ignore-kubelet", "-o", "json")...)), &m); err != nil {
		t.Fatal(err)
	}
	if !m.Complete || len(m.Containers) != 2 || m.Containers[0].Result != reboot.Dumped || m.BootID == "" || len(n.ids()) != 2 {
		t.Errorf("%+v, records %v", m, n.ids())
	}
	if out := n.must(n.args("--dry-run")...); strings.Count(out, "dumped and frozen already") != 2 {
		t.Errorf("dry run:\n%s", out)
	}
	out, stderr, code = n.run(n.args("--abort")...)
	if code != 0 || !strings.Contains(out, "default/a/c  runs on") || !strings.Contains(stderr, "systemctl start kubelet.service") || len(n.ids()) != 0 {
		t.Errorf("abort: exit code %d, records %v\n%s%s", code, n.ids(), out, stderr)
	}
	if out := n.must(n.args("--abort", "-o", "json")...); !strings.Contains(out, `"manifest": false`) {
		t.Errorf("abort again:\n%s", out)
	}

	n.fails(exitUsage, "exclude", n.args("--stop-kubelet", "--ignore-kubelet")...)
	n.fails(exitUsage, "exclude", n.args("--dry-run", "--abort")...)
	n.fails(exitUsage, "--timeout", n.args("--timeout", "0s")...)
	n.fails(exitNotFound, "no store", "prepare-reboot", "--root", n.state+"/nowhere")
	n.fails(exitFailure, "state directory", "prepare-reboot", "--ignore-kubelet", "--containerd-state", n.state+"/nowhere")
	b.mu.Lock()
	b.memory = 1 << 60
	b.mu.Unlock()
	n.fails(exitFailure, "nothing was frozen", n.args("--ignore-kubelet")...)
	n.fails(exitFailure, "not enough free space", n.args("--dry-run")...)
	n.must(n.args("--dry-run", "--best-effort")...)
}

// TestPrepareRebootInterrupted ends it while a container is being dumped.
func TestPrepareRebootInterrupted(t *testing.T) {
	n := newRebootNode(t)
	n.serve("a")
	n.serve("b").hang = true
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var out bytes.Buffer
	stderr := cancelWriter{part: "default/a/c", cancel: cancel}
	code := run(ctx, append([]string{"--root", n.Root()}, n.args("--ignore-kubelet")...), terminal{strings.NewReader(""), &out, &stderr})
	if code != exitInterrupted || !strings.Contains(stderr.String(), "stays frozen") || !strings.Contains(stderr.String(), "--abort") {
		t.Errorf("exit code %d\n%s%s", code, out.String(), stderr.String())
	}
	if !strings.Contains(out.String(), "1 of 2 containers dumped") {
		t.Errorf("no table of what is dumped:\n%s", out.String())
	}
}

// cancelWriter calls cancel when it is told the part.
type cancelWriter struct {
	bytes.Buffer
	part   string
	cancel func()
}

func (w *cancelWriter) Write(b []byte) (int, error) {
	if strings.Contains(string(b), w.part) {
		w.cancel()
	}
	return w.Buffer.Write(b)
}

func TestPredictReboot(t *testing.T) {
	n := newRebootNode(t)
	s := n.serve("a")
	for _, took := range []time.Duration{time.Second, 3 * time.Second, 2 * time.Second} {
		if err := event.Append(n.Root(), event.Event{Type: event.Dumped, DurationMicros: took.Microseconds()}); err != nil {
			t.Fatal(err)
		}
	}
	var p predictionsJSON
	out, stderr, code := n.run(n.args("--dry-run", "-o", "json")...)
	if err := json.Unmarshal([]byte(out), &p); err != nil {
		t.Fatalf("%v\n%s%s", err, out, stderr)
	}
	if len(p.Containers) != 1 || p.Containers[0].MemoryBytes != 10<<20 || p.FreeBytes == 0 || p.DiskBytesSec == 0 {
		t.Fatalf("%+v", p)
	}
	if c := p.Containers[0]; code != 0 || len(c.Problems) > 0 || !strings.Contains(strings.Join(c.Warnings, " "), "not found") || c.Millis < 2000 || p.Millis != c.Millis {
		t.Errorf("exit code %d, %+v\n%s", code, p, stderr)
	}
	writeFile(t, filepath.Join(n.state, "io.containerd.runtime.v2.task/k8s.io/broken/config.json"), "{", 0o600)
	n.fails(exitFailure, "1 of 2 containers cannot be dumped", n.args("--dry-run")...)
	n.must(n.args("--dry-run", "--best-effort")...)
	if base, err := baseTime(n.Root(), 1<<30); err != nil || base != 2*time.Second {
		t.Errorf("base %v, %v; want the median", base, err)
	}
	if base, err := baseTime(t.TempDir(), 1<<30); err != nil || base != defaultBase {
		t.Errorf("base %v, %v", base, err)
	}
	if s.status.State != control.Running || len(n.ids()) != 0 {
		t.Error("a dry run did something")
	}
	if names, err := filepath.Glob(filepath.Join(n.Root(), ".trash*")); err != nil || len(names) > 0 {
		t.Errorf("left over: %v, %v", names, err)
	}
	if dumpSlots != shim.DefaultConfig().DumpSlots {
		t.Errorf("%d dump slots, shims have %d", dumpSlots, shim.DefaultConfig().DumpSlots)
	}
}

func TestStatusOfReboot(t *testing.T) {
	for name, tc := range map[string]struct {
		status nri.Status
		want   []string
	}{
		"never":    {nri.Status{}, nil},
		"unread":   {nri.Status{RebootError: "corrupt\x1b"}, []string{"Reboot: corrupt?"}},
		"nobody":   {nri.Status{Reboot: &reboot.NodeReport{Rebooted: true, Kernel: "6.12"}}, []string{"rebooted since", "6.12"}},
		"prepared": {nri.Status{Reboot: &reboot.NodeReport{}}, []string{"not rebooted since"}},
		"rebooted": {nri.Status{Reboot: &reboot.NodeReport{Rebooted: true, Counts: map[reboot.State]int{reboot.Cold: 1, reboot.Restored: 2},
			Containers: []reboot.Report{{Entry: reboot.Entry{ContainerID: "4f5a", PodName: "db", Reason: "of the dump"}, State: reboot.Cold, Reason: "cpu flag"}}}},
			[]string{"2 restored, 1 cold", "4f5a", "db", "cold", "cpu flag"}},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			c := &cli{terminal: terminal{out: &out}}
			if err := c.printReboot(&tc.status); err != nil {
				t.Fatal(err)
			}
			for _, want := range tc.want {
				if !strings.Contains(out.String(), want) {
					t.Errorf("no %q in\n%s", want, out.String())
				}
			}
			if tc.want == nil && out.Len() > 0 || strings.Contains(out.String(), "of the dump") {
				t.Error(out.String())
			}
		})
	}
}

func TestProgressOnTerminal(t *testing.T) {
	var err bytes.Buffer
	p := progress{c: &cli{terminal: terminal{err: &err}}, terminal: true}
	for i := 1; i <= 2; i++ {
		p.container(i, 2, reboot.Entry{ContainerID: fmt.Sprint("c", i), Result: reboot.Dumped})
	}
	p.end()
	if got := err.String(); strings.Count(got, "1 of 2 are done") != 1 || strings.Count(got, "\n") != 2 || !strings.HasSuffix(got, "\r\x1b[K") {
		t.Errorf("%q", got)
	}
}
