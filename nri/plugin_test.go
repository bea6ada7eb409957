package nri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// runtimeSide is the runtime's half of NRI, the one that containerd uses, over
// a real socket.
type runtimeSide struct {
	*adaptation.Adaptation
	pods []*api.PodSandbox
}

func startRuntime(t *testing.T, socket string, pods ...*api.PodSandbox) *runtimeSide {
	t.Helper()
	r := &runtimeSide{pods: pods}
	dir := t.TempDir()
	var err error
	r.Adaptation, err = adaptation.New("testruntime", "v1.2.3",
		func(ctx context.Context, cb adaptation.SyncCB) error {
			_, err := cb(ctx, r.pods, nil)
			return err
		},
		func(context.Context, []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) { return nil, nil },
		adaptation.WithSocketPath(socket), adaptation.WithPluginPath(filepath.Join(dir, "plugins")), adaptation.WithPluginConfigPath(filepath.Join(dir, "conf.d")))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *runtimeSide) create(t *testing.T, pod *api.PodSandbox, c *api.Container) (map[string]string, error) {
	t.Helper()
	b := r.BlockPluginSync()
	defer b.Unblock()
	reply, err := r.CreateContainer(context.Background(), &api.CreateContainerRequest{Pod: pod, Container: c})
	return reply.GetAdjust().GetAnnotations(), err
}

// socketPath is short: a socket's name has at most 107 bytes.
func socketPath(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nri-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "nri.sock")
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timeout: %s", what)
		}
	}
}

// startNode is a runtime as a process is one: when it ends, its connections do,
// which those of package adaptation outlive.
func startNode(t *testing.T, socket string, pods ...*api.PodSandbox) (*runtimeSide, func()) {
	t.Helper()
	inner := socketPath(t)
	r := startRuntime(t, inner, pods...)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var conns []net.Conn
	go func() {
		for {
			front, err := l.Accept()
			if err != nil {
				return
			}
			back, err := net.Dial("unix", inner)
			if err != nil {
				front.Close()
				return
			}
			mu.Lock()
			conns = append(conns, front, back)
			mu.Unlock()
			go io.Copy(front, back)
			go io.Copy(back, front)
		}
	}()
	return r, func() {
		l.Close()
		mu.Lock()
		defer mu.Unlock()
		for _, c := range conns {
			c.Close()
		}
		r.Stop()
	}
}

type jobLog struct {
	mu   sync.Mutex
	jobs []job
}

func (l *jobLog) add(j job) { l.mu.Lock(); l.jobs = append(l.jobs, j); l.mu.Unlock() }
func (l *jobLog) events() (es []event.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, j := range l.jobs {
		es = append(es, j.events...)
	}
	return es
}

func testPlugin(latest func(context.Context, checkpoint.Identity) (*checkpoint.Manifest, error)) (*plugin, *jobLog) {
	l := new(jobLog)
	return &plugin{latest: latest, later: l.add, metrics: newMetrics("test"), pods: newPods(), lookups: make(chan struct{}, 2), accepted: make(chan struct{})}, l
}

func connect(t *testing.T, p *plugin, socket string) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); p.connect(ctx, socket, "90") }()
	t.Cleanup(func() {
		cancel()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Error("the plugin does not stop")
		}
	})
}

func (p *plugin) isConnected() bool { return testutil.ToFloat64(p.metrics.connected) == 1 }

func testPod(annotations map[string]string) *api.PodSandbox {
	return &api.PodSandbox{Id: "sandbox", Name: "pod", Uid: "uid-1", Namespace: "default", Annotations: annotations}
}

func testContainer(annotations map[string]string) *api.Container {
	return &api.Container{Id: "id", Name: "c", PodSandboxId: "sandbox", Annotations: annotations, Image: &api.Image{Digest: digestA}}
}

// TestPlugin goes through registration, pods, and a container's creation, over
// a real socket, across a restart of the runtime.
func TestPlugin(t *testing.T) {
	socket := socketPath(t)
	p, jobs := testPlugin(func(_ context.Context, i checkpoint.Identity) (*checkpoint.Manifest, error) {
		if i != (checkpoint.Identity{Namespace: "default", Key: "uid-1", Container: "c"}) {
			t.Errorf("asked for %s", i)
		}
		return &checkpoint.Manifest{ID: recordID, ImageDigest: digestA}, nil
	})
	connect(t, p, socket) // before there is a runtime
	pod := testPod(map[string]string{checkpoint.AnnotationPolicy: "resume", "stasis.dev/typo": "x"})
	other := &api.PodSandbox{Id: "other", Uid: "uid-2"}
	r, stop := startNode(t, socket, other)
	eventually(t, "connected", p.isConnected)
	if got := p.connectedTo(); got != "testruntime v1.2.3" {
		t.Errorf("connected to %q", got)
	}
	if n := p.pods.count(); n != 1 {
		t.Errorf("%d pods after the first synchronization, want 1", n)
	}
	// The runtime sends events only a moment after the synchronization.
	eventually(t, "the pod is known", func() bool {
		if err := r.RunPodSandbox(context.Background(), &api.RunPodSandboxRequest{Pod: pod}); err != nil {
			t.Fatal(err)
		}
		return p.pods.count() == 2
	})
	check := func(r *runtimeSide) {
		t.Helper()
		got, err := r.create(t, pod, testContainer(map[string]string{checkpoint.InternalKey: "stolen", checkpoint.CRIUConfigAnnotation: "/evil"}))
		if err != nil {
			t.Fatal(err)
		}
		if got[checkpoint.InternalCheckpointID] != string(recordID) || got[checkpoint.InternalKey] != "uid-1" {
			t.Errorf("annotations %v", got)
		}
		if _, ok := got[api.MarkForRemoval(checkpoint.CRIUConfigAnnotation)]; !ok {
			t.Errorf("%s is not removed: %v", checkpoint.CRIUConfigAnnotation, got)
		}
	}
	check(r)
	check(r)
	if es := jobs.events(); len(es) != 1 || es[0].Type != event.Ignored {
		t.Errorf("the unknown annotation was told %d times: %+v", len(es), es)
	}
	if _, err := r.create(t, other, testContainer(nil)); err != nil {
		t.Errorf("a container that did not opt in: %v", err)
	}

	stop()
	eventually(t, "disconnected", func() bool { return !p.isConnected() && p.connectedTo() == "" })
	r, stop = startNode(t, socket, pod)
	defer stop()
	eventually(t, "connected again", p.isConnected)
	check(r)
	if n := p.pods.count(); n != 1 {
		t.Errorf("%d pods after the second synchronization, want 1", n)
	}
	p.pods.now = func() time.Time { return time.Now().Add(2 * deadAfter) }
	if !p.pods.dead("uid-2") || p.pods.dead("uid-1") || p.pods.dead("never seen") {
		t.Errorf("dead: uid-2 %v, uid-1 %v, never seen %v", p.pods.dead("uid-2"), p.pods.dead("uid-1"), p.pods.dead("never seen"))
	}
}

// TestHangingStore gives up on a store that does not answer: the container
// starts cold, strict ones do not start, and the plugin stays connected.
func TestHangingStore(t *testing.T) {
	hang := make(chan struct{})
	defer close(hang)
	socket := socketPath(t)
	p, jobs := testPlugin(func(context.Context, checkpoint.Identity) (*checkpoint.Manifest, error) {
		<-hang
		return nil, checkpoint.ErrNotFound
	})
	r, stop := startNode(t, socket)
	defer stop()
	connect(t, p, socket)
	eventually(t, "connected", p.isConnected)
	for range 3 { // more than may hang at a time
		start := time.Now()
		got, err := r.create(t, testPod(map[string]string{checkpoint.AnnotationPolicy: "resume"}), testContainer(nil))
		if err != nil || got[checkpoint.InternalPolicy] != "resume" || got[checkpoint.InternalCheckpointID] != "" {
			t.Errorf("annotations %v, error %v", got, err)
		}
		if d := time.Since(start); d > DecisionTimeout+500*time.Millisecond {
			t.Errorf("answered after %v", d)
		}
	}
	_, err := r.create(t, testPod(map[string]string{checkpoint.AnnotationPolicy: "resume", checkpoint.AnnotationOnFailure: "fail"}), testContainer(nil))
	if err == nil || !strings.Contains(err.Error(), "could not be looked up") {
		t.Errorf("strict: error %v", err)
	}
	var codes []string
	for _, e := range jobs.events() {
		codes = append(codes, string(e.Type)+" "+e.ReasonCode)
	}
	if want := "cold-start timeout,cold-start timeout,cold-start timeout,restore-failed timeout"; strings.Join(codes, ",") != want {
		t.Errorf("events %v, want %s", codes, want)
	}
	if !p.isConnected() {
		t.Error("disconnected")
	}
}

// TestDeafRuntime meets a runtime that accepts and never answers: the attempt
// ends with its own context.
func TestDeafRuntime(t *testing.T) {
	socket := socketPath(t)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan struct{})
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		close(accepted)
		io.Copy(io.Discard, c)
	}()
	p, _ := testPlugin(nil)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { _, err := p.serve(ctx, socket, "90"); done <- err }()
	<-accepted
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the attempt does not end")
	}
}

// TestLookupWaitsForAClaim: a checkpoint that the failed predecessor's shim is
// about to give back is waited for; one that stays claimed is told as busy.
func TestLookupWaitsForAClaim(t *testing.T) {
	var calls int
	p := &plugin{lookups: make(chan struct{}, maxLookups)}
	busyUntil := func(n int) func() (*checkpoint.Manifest, error) {
		calls = 0
		return func() (*checkpoint.Manifest, error) {
			calls++
			if calls < n {
				return nil, fmt.Errorf("claimed: %w", checkpoint.ErrBusy)
			}
			return &checkpoint.Manifest{PodName: "found"}, nil
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), DecisionTimeout)
	defer cancel()
	if m, err := p.lookup(ctx, busyUntil(3)); err != nil || m.PodName != "found" {
		t.Errorf("given back after a moment: %v, %v", m, err)
	}
	begin := time.Now()
	if _, err := p.lookup(ctx, busyUntil(1<<30)); !errors.Is(err, checkpoint.ErrBusy) || errors.Is(err, errLate) {
		t.Errorf("never given back: %v, want ErrBusy in time", err)
	}
	if d := time.Since(begin); d > DecisionTimeout {
		t.Errorf("it took %s", d)
	}
}
