#!/bin/sh
# No output overwrites an input, another output, or a file that is not ours. Gives every output of
# every command every input in turn, by its name, another spelling, a symbolic and a hard link; puts
# a file of somebody else where each output goes; and gives two outputs one name. The command must
# end with exit code 1 and a message, and every file be there as before. What an earlier run of the
# same command wrote is replaced. Usage: dev/sweep.sh [PROGRAM...]; run it where the programs are.
set -eu
export OMP_NUM_THREADS=1
d=build/sweep bad=0 tried=0
[ $# -gt 0 ] || set -- data_prep moleblend moleculesde
mkdir -p build
rm -rf $d $d.inputs
mkdir $d.inputs

sums() { (cd $d && find . ! -type d -exec cksum {} + | sort -k 3); }

# Fresh inputs in $d; a variable for each, $in for in.csv.
fresh() {
    rm -rf $d
    cp -r $d.inputs $d
    for f in $d/*; do name=${f##*/}; eval "${name%%.*}=$f"; done
}

# The command of $1 must be refused and leave all files as they are.
refuse() {
    before=$(sums)
    code=0
    eval "$1" > build/sweep.out 2>&1 < /dev/null || code=$?
    tried=$((tried + 1))
    if [ $code -ne 1 ] || ! tail -n 1 build/sweep.out | grep -q -e 'another name' -e 'cannot write: '
    then
        echo "not refused ($code), $2:"; eval "echo \"  $1\""; cat build/sweep.out; bad=$((bad + 1))
    fi
    [ "$before" = "$(sums)" ] || { echo "files changed, $2:"; eval "echo \"  $1\""; bad=$((bad + 1)); }
}

# Command $3 reads the files whose variables are $1 and writes the files $2 of $d.
sweep() {
    fresh
    for again in 1 2; do
        eval "$3" > build/sweep.out 2>&1 || { echo "fails, time $again: $3"; cat build/sweep.out; exit 1; }
    done
    for file in $2; do
        fresh
        echo "somebody else's" > $d/"$file"
        refuse "$3" "$file is somebody else's"
        for role in $1; do
            for how in name spelling link hard; do
                fresh
                other=$d/other  # predict knows further models by their ending
                [ $role != second ] || other=$d/other.safetensors
                eval "mv \$$role $d/$file"
                case $how in
                    name) path=$d/$file ;;
                    spelling) path=$d/../sweep/$file ;;
                    link) path=$other; ln -s "$file" "$path" ;;
                    hard) path=$other; ln $d/"$file" "$path" ;;
                esac
                eval "$role=$path"
                refuse "$3" "$role is $file, by $how"
            done
        done
    done
}

i=$d.inputs
printf 'smiles,y\nCCO,1\nCCN,0\nCCC,1\nCC=O,0\nc1ccccc1,1\nCCCl,0\n' > $i/in.csv
printf '3\n' > $i/skip.txt
printf '1 train\n2 valid\n3 test\n4 train\n' > $i/parts.txt
awk '{ print } /^[$][$][$][$]/ && ++n == 6 { exit }' data/sample.sdf > $i/sdf.sdf
printf 'name,y\nx,1\n' > $i/labels.csv
./data_prep -o $i/train.bin --labels y $i/in.csv 2> /dev/null
cp $i/train.bin $i/valid.bin
cp $i/train.bin $i/test.bin
small="--layers 1 --dim 8 --ffn 8 --heads 1 --kernels 2"
shape="--layers 1 --dim 8 --blocks 1 --filters 8 --gaussians 4"
nets="--hidden 8 --width 4 --channels 1 --last-channels 1 --batch-size 2 --steps 1"
trained="out.safetensors out.safetensors.tmp out.safetensors.state out.safetensors.state.tmp
         out.log.csv out.log.csv.tmp"
for program; do
    case $program in
        data_prep)
            sweep "in skip" "out.bin out.bin.tmp rej.csv rej.csv.tmp" \
                './data_prep -o $d/out.bin --rejects $d/rej.csv --skip-list $skip --labels y $in'
            sweep "in skip parts" "out.train.bin out.valid.bin out.test.bin out.train.bin.tmp
                out.test.bin.tmp out.{}.bin.records.tmp rej.csv" \
                './data_prep -o "$d/out.{}.bin" --rejects $d/rej.csv --skip-list $skip --split-by file:$parts --format csv $in'
            sweep "sdf labels" "out.bin" \
                './data_prep -o $d/out.bin --labels y --labels-from $labels --labels-by number $sdf'
            for two in "$d/out.bin --rejects $d/out.bin" "$d/out.bin --rejects $d/../sweep/out.bin" \
                "$d/out.bin --rejects $d/out.bin.tmp" "- --rejects -" \
                "$d/out.bin --split 0.8,0.2 --rejects $d/out.valid.bin"; do
                fresh
                refuse "./data_prep -o $two \$in" "two outputs"
            done
            fresh
            ln -s train.bin $d/link.bin
            refuse './data_prep -o $d/train.bin --rejects $d/link.bin $in' "two outputs, one a link" ;;
        moleblend)
            eval "./moleblend $i/train.bin $small --batch-size 2 --steps 1 -o $i/init.safetensors" > /dev/null 2>&1
            eval "./moleblend finetune $i/train.bin $small --epochs 1 -o $i/model.safetensors" > /dev/null 2>&1
            eval "./moleblend finetune $i/train.bin $small --epochs 1 --seed 2 -o $i/second.safetensors" > /dev/null 2>&1
            rm -f $i/*.state $i/*.log.csv
            sweep "train valid init" "$trained" \
                './moleblend $train --valid $valid --init $init --batch-size 2 --steps 1 -o $d/out.safetensors'
            sweep "train valid test init" "$trained out.seed1.safetensors out.seed2.safetensors" \
                './moleblend finetune $train --valid $valid --test $test --init $init --epochs 1 --seeds 2 -o $d/out.safetensors'
            sweep "train model" "out.csv out.csv.tmp" \
                './moleblend predict $train --model $model $second -o $d/out.csv'
            sweep "second" "out.safetensors" \
                './moleblend predict $train --model $model $second -o $d/out.safetensors'
            sweep "train model" "out.npy out.csv out.index.npy out.npy.tmp out.csv.tmp out.index.npy.tmp" \
                './moleblend embed $train --model $model --level atom -o $d/out.npy'
            sweep "train init" "out.svg out.svg.tmp" \
                './moleblend show $train 1 --model $init --svg $d/out.svg' ;;
        moleculesde)
            sde=./moleculesde/moleculesde
            for part in train valid test; do
                ./data_prep -o $i/$part.bin --labels logP $i/sdf.sdf 2> /dev/null
            done
            eval "$sde $i/train.bin $shape $nets -o $i/init.safetensors" > /dev/null 2>&1
            eval "$sde finetune $i/train.bin $shape --epochs 1 -o $i/model.safetensors" > /dev/null 2>&1
            rm -f $i/*.state $i/*.log.csv
            sweep "train valid init" "$trained" \
                '$sde $train --valid $valid --init $init $shape $nets -o $d/out.safetensors'
            sweep "train valid test init" "$trained" \
                '$sde finetune $train --valid $valid --test $test --init $init $shape --epochs 1 -o $d/out.safetensors'
            sweep "train model" "out.npy out.npy.tmp" '$sde embed $train --model $model -o $d/out.npy'
            sweep "train init" "out.sdf out.sdf.tmp" \
                '$sde generate $train 0 --model $init --sample-steps 2 -o $d/out.sdf' ;;
    esac
done
echo "$tried commands, $bad faults"
[ $bad -eq 0 ]
