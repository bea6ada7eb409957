package criu

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// Binary is CRIU's program, looked up in PATH.
const Binary = "criu"

// rpcTimeout bounds a question to CRIU that the caller gave no deadline. The
// first after a boot takes long where the machine is slow: CRIU tries out all
// that the kernel can do, and keeps what it found in /run/criu.kdat.
const rpcTimeout = time.Minute

// FeatureSet says what CRIU can do on this kernel.
type FeatureSet struct {
	MemTrack   bool `json:"memTrack"`   // soft-dirty pages: incremental dumps
	LazyPages  bool `json:"lazyPages"`  // userfaultfd
	PidfdStore bool `json:"pidfdStore"` // pidfds of tasks are kept between pre-dumps
}

// Version is the version of the CRIU in PATH: major*10000 + minor*100 +
// sublevel, and as text, "4.2.1". It starts a process: not for shims.
func Version(ctx context.Context) (int, string, error) {
	resp, err := ask(ctx, &rpc.CriuReq{Type: rpc.CriuReqType_VERSION.Enum()})
	if err != nil {
		return 0, "", fmt.Errorf("criu version: %w", err)
	}
	v := resp.GetVersion()
	major, minor, sub := v.GetMajorNumber(), v.GetMinorNumber(), v.GetSublevel()
	text := fmt.Sprintf("%d.%d", major, minor)
	if sub != 0 {
		text += fmt.Sprintf(".%d", sub)
	}
	return int(major*10000 + minor*100 + sub), text, nil
}

// Features asks CRIU what it can do on this kernel. It starts a process: not
// for shims.
func Features(ctx context.Context) (FeatureSet, error) {
	resp, err := ask(ctx, &rpc.CriuReq{
		Type: rpc.CriuReqType_FEATURE_CHECK.Enum(),
		Features: &rpc.CriuFeatures{
			MemTrack:   proto.Bool(true),
			LazyPages:  proto.Bool(true),
			PidfdStore: proto.Bool(true),
		},
	})
	if err != nil {
		return FeatureSet{}, fmt.Errorf("criu features: %w", err)
	}
	f := resp.GetFeatures()
	return FeatureSet{MemTrack: f.GetMemTrack(), LazyPages: f.GetLazyPages(), PidfdStore: f.GetPidfdStore()}, nil
}

// ask sends one request to a `criu swrk` of its own. go-criu's Criu object is
// not used for it: it knows no context, and in v7.2.0 its FeatureCheck returns
// the features that were asked for instead of those in the answer.
func ask(ctx context.Context, req *rpc.CriuReq) (_ *rpc.CriuResp, err error) {
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	b, err := proto.Marshal(req)
	if err != nil {
		return nil, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "criu-client"), os.NewFile(uintptr(fds[1]), "criu-server")
	defer ours.Close()
	cmd := exec.CommandContext(ctx, Binary, "swrk", "3")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.WaitDelay = time.Second
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return nil, err
	}
	defer func() {
		ours.Close() // CRIU ends when its client is gone
		if werr := cmd.Wait(); err == nil && ctx.Err() != nil {
			err = fmt.Errorf("criu swrk: %w", werr)
		}
	}()
	if _, err := ours.Write(b); err != nil {
		return nil, fmt.Errorf("criu swrk: send: %w", err)
	}
	buf := make([]byte, 8192)
	n, err := ours.Read(buf) // ends when CRIU dies, by the context at the latest
	if err != nil {
		return nil, fmt.Errorf("criu swrk: receive: %w", err)
	}
	resp := new(rpc.CriuResp)
	if err := proto.Unmarshal(buf[:n], resp); err != nil {
		return nil, fmt.Errorf("criu swrk: answer: %w", err)
	}
	if !resp.GetSuccess() || resp.GetType() != req.GetType() {
		return nil, fmt.Errorf("criu swrk: %s failed: %s (errno %d)", req.GetType(), resp.GetCrErrmsg(), resp.GetCrErrno())
	}
	return resp, nil
}
