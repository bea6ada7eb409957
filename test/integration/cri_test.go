package integration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/internal/testenv"
	"github.com/stasis-containers/stasis/nri/eventlog"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

const (
	criSocket = "unix:///run/containerd/containerd.sock"
	registry  = "127.0.0.1:5000/"
	storeRoot = "/var/lib/stasis"
	handler   = "stasis"
)

// slow is the factor by which every time limit of the tests is longer than on
// hardware: STASIS_SLOW, for emulated machines.
var slow = func() int64 {
	if n, err := strconv.ParseInt(os.Getenv("STASIS_SLOW"), 10, 64); err == nil && n > 0 {
		return n
	}
	return 1
}()

// deadline bounds every single step.
var deadline = time.Duration(slow) * 60 * time.Second

// node is a connection to the CRI of the test node.
type node struct {
	t  testing.TB
	rt cri.RuntimeServiceClient
	im cri.ImageServiceClient
}

func newNode(t testing.TB) *node {
	t.Helper()
	testenv.Need(t, testenv.Root, testenv.CRIU, testenv.Runc, testenv.Node)
	// The calls of a test that restarts containerd wait for it, as long as any call may take.
	conn, err := grpc.NewClient(criSocket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &node{t: t, rt: cri.NewRuntimeServiceClient(conn), im: cri.NewImageServiceClient(conn)}
}

func (n *node) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	n.t.Cleanup(cancel)
	return ctx
}

func (n *node) pull(image string) string {
	n.t.Helper()
	ref := registry + image + ":latest"
	st, err := n.im.ImageStatus(n.ctx(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
	if err == nil && st.Image != nil {
		return ref
	}
	if _, err := n.im.PullImage(n.ctx(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		n.t.Fatalf("pull %s: %v", ref, err)
	}
	return ref
}

// pod is one sandbox; its name and annotations may be used for several in turn.
type pod struct {
	n      *node
	id     string
	config *cri.PodSandboxConfig
}

var podCount int

// uniqueKey makes an identity that no other test uses.
func uniqueKey(t testing.TB) string {
	podCount++
	name := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		if r >= 'A' && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return '-'
	}, t.Name())
	if len(name) > 40 {
		name = name[:40]
	}
	return strings.Trim(fmt.Sprintf("%s-%d", name, podCount), "-")
}

func annotate(key string, more ...string) map[string]string {
	a := map[string]string{checkpoint.AnnotationPolicy: "resume", checkpoint.AnnotationKey: key}
	for i := 0; i+1 < len(more); i += 2 {
		a[more[i]] = more[i+1]
	}
	return a
}

type podOption func(*cri.PodSandboxConfig)

func (n *node) runPod(name string, annotations map[string]string, opts ...podOption) *pod {
	n.t.Helper()
	podCount++
	uid := fmt.Sprintf("%s-%d-%d", name, os.Getpid(), podCount)
	c := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: uid, Namespace: "default", Attempt: 0},
		Hostname:     fmt.Sprintf("%s-%d", name, podCount),
		LogDirectory: filepath.Join("/var/log/pods", uid),
		Annotations:  annotations,
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
		}},
	}
	for _, o := range opts {
		o(c)
	}
	if len(c.Hostname) > 63 {
		c.Hostname = c.Hostname[len(c.Hostname)-63:]
		c.Hostname = strings.TrimLeft(c.Hostname, "-")
	}
	if err := os.MkdirAll(c.LogDirectory, 0o755); err != nil {
		n.t.Fatal(err)
	}
	r, err := n.rt.RunPodSandbox(n.ctx(), &cri.RunPodSandboxRequest{Config: c, RuntimeHandler: handler})
	if err != nil {
		n.t.Fatalf("run pod %s: %v", name, err)
	}
	p := &pod{n: n, id: r.PodSandboxId, config: c}
	n.t.Cleanup(func() { p.remove() })
	return p
}

// remove stops and removes the pod; a pod that is gone already is no error.
func (p *pod) remove() {
	p.n.t.Helper()
	if err := p.tryRemove(); err != nil {
		p.n.t.Errorf("remove pod %s: %v", p.config.Metadata.Name, err)
	}
	p.id = ""
}

// tryRemove removes the containers before the sandbox, as the kubelet does.
// containerd 2.4.2 can deadlock when it is left to RemovePodSandbox: that holds
// the read lock against NRI's synchronisation and takes it once more for each
// container, and a plugin that registers in between waits for the write lock.
func (p *pod) tryRemove() error {
	if p.id == "" {
		return nil
	}
	ctx := p.n.ctx()
	if _, err := p.n.rt.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return err
	}
	r, err := p.n.rt.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: p.id}})
	if err != nil {
		return err
	}
	for _, c := range r.Containers {
		if _, err := p.n.rt.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: c.Id}); err != nil {
			return err
		}
	}
	_, err = p.n.rt.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.id})
	return err
}

// ctr is one container of a pod.
type ctr struct {
	p      *pod
	id     string
	config *cri.ContainerConfig
}

type ctrOption func(*cri.ContainerConfig)

func (p *pod) tryCreate(name, image string, command []string, opts ...ctrOption) (*ctr, error) {
	c := &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name},
		Image:    &cri.ImageSpec{Image: p.n.pull(image)},
		Command:  command,
		LogPath:  name + ".log",
		Linux: &cri.LinuxContainerConfig{
			Resources: &cri.LinuxContainerResources{},
			SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
			},
		},
	}
	for _, o := range opts {
		o(c)
	}
	r, err := p.n.rt.CreateContainer(p.n.ctx(), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: c, SandboxConfig: p.config})
	if err != nil {
		return nil, err
	}
	return &ctr{p: p, id: r.ContainerId, config: c}, nil
}

func (c *ctr) tryStart() error {
	_, err := c.p.n.rt.StartContainer(c.p.n.ctx(), &cri.StartContainerRequest{ContainerId: c.id})
	return err
}

// start creates and starts a container.
func (p *pod) start(name, image string, command []string, opts ...ctrOption) *ctr {
	p.n.t.Helper()
	c, err := p.tryCreate(name, image, command, opts...)
	if err != nil {
		p.n.t.Fatalf("create %s: %v", name, err)
	}
	if err := c.tryStart(); err != nil {
		p.n.t.Fatalf("start %s: %v", name, err)
	}
	return c
}

func shell(script string) []string { return []string{"/bin/sh", "-c", script} }

// exec runs a command in the container and returns its standard output.
func (c *ctr) exec(command ...string) (string, error) {
	r, err := c.p.n.rt.ExecSync(c.p.n.ctx(), &cri.ExecSyncRequest{ContainerId: c.id, Cmd: command, Timeout: 20 * slow})
	if err != nil {
		return "", err
	}
	if r.ExitCode != 0 {
		return string(r.Stdout), fmt.Errorf("%v: exit code %d: %s", command, r.ExitCode, r.Stderr)
	}
	return strings.TrimSpace(string(r.Stdout)), nil
}

func (c *ctr) mustExec(command ...string) string {
	c.p.n.t.Helper()
	out, err := c.exec(command...)
	if err != nil {
		c.p.n.t.Fatalf("exec %v: %v", command, err)
	}
	return out
}

func (c *ctr) stop(timeout int64) {
	c.p.n.t.Helper()
	if _, err := c.p.n.rt.StopContainer(c.p.n.ctx(), &cri.StopContainerRequest{ContainerId: c.id, Timeout: timeout * slow}); err != nil {
		c.p.n.t.Fatalf("stop %s: %v", c.config.Metadata.Name, err)
	}
}

func (c *ctr) status() *cri.ContainerStatus {
	c.p.n.t.Helper()
	r, err := c.p.n.rt.ContainerStatus(c.p.n.ctx(), &cri.ContainerStatusRequest{ContainerId: c.id})
	if err != nil {
		c.p.n.t.Fatalf("status of %s: %v", c.config.Metadata.Name, err)
	}
	return r.Status
}

func (c *ctr) log() string {
	b, err := os.ReadFile(filepath.Join(c.p.config.LogDirectory, c.config.LogPath))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.p.n.t.Fatal(err)
	}
	return string(b)
}

// waitLog waits until the container's log holds the text.
func (c *ctr) waitLog(want string) {
	c.p.n.t.Helper()
	eventually(c.p.n.t, "the log's "+strconv.Quote(want), func() error {
		if log := c.log(); !strings.Contains(log, want) {
			return fmt.Errorf("log %q", log)
		}
		return nil
	})
}

// eventually polls until f returns nil.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(deadline / 2); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

// events returns what the node's event log holds for an identity.
func events(t testing.TB, key string) []event.Event {
	t.Helper()
	var out []event.Event
	err := eventlog.Read(storeRoot, func(e event.Event) {
		if e.Identity != nil && e.Identity.Key == key {
			out = append(out, e)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// stages are those of the identity's checkpoints; what a shim left that another
// test killed is not among them.
func stages(key string) []string {
	id := checkpoint.Identity{Namespace: "default", Key: key, Container: "c"}
	names, _ := filepath.Glob(filepath.Join(storeRoot, ".stage-"+id.Hash()+"-*")) // the pattern is valid
	return names
}

// wantEvent fails unless the newest event of the identity has the type and code.
func wantEvent(t testing.TB, key string, typ event.Type, code string) event.Event {
	t.Helper()
	es := events(t, key)
	for i := len(es) - 1; i >= 0; i-- {
		if es[i].Type == typ {
			if es[i].ReasonCode != code {
				t.Fatalf("event %s: code %q (%s), want %q", typ, es[i].ReasonCode, es[i].Reason, code)
			}
			return es[i]
		}
	}
	t.Fatalf("no event %s for key %s; there are: %+v", typ, key, es)
	return event.Event{}
}

func podStatusRequest(id string) *cri.PodSandboxStatusRequest {
	return &cri.PodSandboxStatusRequest{PodSandboxId: id}
}

func stopRequest(id string, timeout int64) *cri.StopContainerRequest {
	return &cri.StopContainerRequest{ContainerId: id, Timeout: timeout}
}

func statsRequest(id string) *cri.ContainerStatsRequest {
	return &cri.ContainerStatsRequest{ContainerId: id}
}
